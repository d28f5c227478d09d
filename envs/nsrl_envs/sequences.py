"""The task sequences: tasks with equal spaces that one policy is to learn one after the other."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskSequence:
    """Tasks in the order in which they are learnt, with equal observation and action spaces."""

    name: str
    """Name in `SEQUENCES`."""
    tasks: tuple[str, ...]
    """Gymnasium ids; the context input of the first one is zero."""
    extra: str | None
    """Extra of nsrl that installs what the tasks need; None if nsrl alone is enough."""
    about: str
    """What changes from task to task."""


SEQUENCES: dict[str, TaskSequence] = {
    sequence.name: sequence
    for sequence in (
        TaskSequence(
            name="cartpole_trio",
            tasks=("nsrl/CartPoleTrio-v0", "nsrl/CartPoleTrioSwapped-v0", "nsrl/CartPoleTrioReversedAngle-v0"),
            extra=None,
            about="left and right are swapped; then they are not, but the angle's gauge shows its negative",
        ),
    )
}
