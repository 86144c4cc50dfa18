"""The exception for errors that a user can cause."""


class UserError(Exception):
    """An error in the input: what is wrong, where, and the remedy, in one sentence each.

    Entry points print it without a traceback and exit with status 2.
    """

    def __init__(self, what: str, *, where: object = None, remedy: str | None = None):
        self.what, self.where, self.remedy = what, where, remedy
        place = f" ({where})" if where is not None else ""
        super().__init__(f"{what.removesuffix('.')}{place}." + (f" {remedy}" if remedy else ""))
