"""The one exception that means "the input was wrong", not "the program is"."""


class UserError(Exception):
    """Bad input. The message names what was wrong, its value and what is accepted; the CLI exits with 2."""
