"""What can be wrong with a task, each said in one sentence."""

from gymnasium.error import DependencyNotInstalled


class TaskError(ValueError):
    """A task, a pair or an environment does not fit: what was wrong, what was expected, what to do."""


class MissingExtra(TaskError, DependencyNotInstalled):
    """A task needs a package that is not installed; the sentence names the extra that brings it."""
