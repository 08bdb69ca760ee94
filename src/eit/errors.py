"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """Bad input: one line that names what was given and what is allowed. The command line exits with status 2."""
