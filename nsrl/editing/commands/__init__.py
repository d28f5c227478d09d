"""What `nsrl edit` is told, does and draws."""

__all__: list[str] = []
