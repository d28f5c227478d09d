"""Post-training a module inside a KL budget on preserved tokens: what `nsrl.editing.guard` is made of."""

__all__: list[str] = []
