"""The one exception that means: the input is wrong, and this sentence says how to put it right."""


class NsrlError(ValueError):
    """Bad input, told in one sentence: what was wrong, what was expected, what to do.

    The command line prints the sentence on stderr and exits with code 2; nothing is written or lost.
    """
