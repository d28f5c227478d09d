"""Studies: one question each, with the code that answers it and the report."""

__all__: list[str] = []
