"""The `nsrl` command: arguments in, tables out; what is done lies in the rooms below."""

__all__: list[str] = []
