"""`nsrl bench speed`: Gram matrices, projections and their scaling against other libraries, in time and memory."""

__all__: list[str] = []
