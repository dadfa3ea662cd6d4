"""The one exception a user can cause, and nothing else."""


class MedPLIBError(ValueError):
    """Wrong user input, told in one sentence: what was got, what was expected, how to mend it.

    Command-line faces print the sentence without a traceback and exit with 2; servers answer 4xx with it.
    A programmer's error is never a ``MedPLIBError``: it stays a traceback.
    """
