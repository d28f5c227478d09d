"""What `nsrl edit`, `nsrl retain` and `nsrl forecast` are told and do."""

__all__: list[str] = []
