"""Files that somebody else wrote, read as data: bounded before anything is allocated, and nothing in them is run.

Below everything else; nothing here imports from another room but `errors`. In reading order: `limits`, `documents`
(JSON, YAML), `zips`, `arrays` (npz), `pickles`, `tensors` (what `torch.save` writes).
"""

__all__: list[str] = []
