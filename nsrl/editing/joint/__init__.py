"""Values of all edits at once, and their writing at the least cost to the preserved text."""

__all__: list[str] = []
