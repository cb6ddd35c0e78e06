"""Everything factlens refuses, each with what was wrong, with which value, and what to do.

    FactlensError
    ├── FactError (ValueError)            a fact or a prompt that cannot be used
    │   ├── NothingTraced                 of several facts none could be traced
    │   ├── SubjectNotFound               the subject does not occur in the prompt
    │   └── PromptTooLong                 more tokens than the model has positions
    ├── FactFileError (ValueError)        a file of facts with a bad row or column
    ├── PlanError (ValueError)            an unknown kind, window, severing, site, noise or metric
    ├── ConfigError (ValueError)          a configuration with unknown or impossible keys
    ├── ModelNotFound (LookupError)       no such model, folder, or no network to fetch it
    ├── ModelUnsupported (TypeError)      a model without the hook points that are needed
    ├── OutOfMemory (MemoryError)          a model or a run that does not fit
    ├── TraceFileError (ValueError)       a stored trace that is corrupt or not a trace
    ├── EditError (ValueError)            an edit that cannot be computed, or does not belong to the model
    │   └── EditFileError                 a stored edit that is corrupt or no edit
    ├── EditorError (ValueError)          a trained editor that is missing, corrupt, or of another model
    ├── MomentError (ValueError)          key statistics that are corrupt, of another model, or missing
    │   └── SingularMoment                fewer independent keys than neurons
    ├── RatingError (ValueError)          raters' answers, their key or texts to compare that cannot be used
    ├── RunError (ValueError)             a run directory that belongs to another configuration, or is in use
    ├── WorkersError (RuntimeError)       workers that cannot be started, or keep dying
    ├── DownloadError (OSError)           a file that cannot be fetched, or is not what was expected
    └── OutputError (OSError)             a place that cannot be written

`FactWarning` marks what is worth saying once and no reason to stop.
"""


class FactlensError(Exception):
    """Base of every error that factlens raises on purpose."""


class FactError(FactlensError, ValueError):
    """A fact or a prompt that cannot be used."""


class NothingTraced(FactError):
    """Of several facts none could be traced; `skipped` holds (prompt, reason) of each."""

    def __init__(self, message: str, skipped: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.skipped = skipped


class SubjectNotFound(FactError):
    """The subject does not occur, verbatim, in the prompt."""


class PromptTooLong(FactError):
    """The prompt has more tokens than the model has positions."""


class FactFileError(FactlensError, ValueError):
    """A file of facts that cannot be read as such; the message names the row."""


class PlanError(FactlensError, ValueError):
    """Something to trace that does not exist: a kind, window, severing, site, noise or metric."""


class ConfigError(FactlensError, ValueError):
    """A configuration with unknown or impossible keys."""


class ModelNotFound(FactlensError, LookupError):
    """No such model, or no way to fetch it."""


class ModelUnsupported(FactlensError, TypeError):
    """A model without the hook points that are needed."""


class OutOfMemory(FactlensError, MemoryError):
    """A model or a run that does not fit into memory."""


class TraceFileError(FactlensError, ValueError):
    """A stored trace that is corrupt, or no trace at all."""


class EditError(FactlensError, ValueError):
    """An edit that cannot be computed, or does not belong to the model."""


class EditFileError(EditError):
    """A stored edit that is corrupt, or no edit at all."""


class EditorError(FactlensError, ValueError):
    """A trained editor that is not there, is corrupt, or belongs to another model."""


class MomentError(FactlensError, ValueError):
    """Statistics of keys that are corrupt, of another model, or not to be had."""


class SingularMoment(MomentError):
    """Fewer independent keys were seen than the MLP has neurons."""


class RatingError(FactlensError, ValueError):
    """A file of the human evaluation that cannot be used: a rater's answers, their key, or texts to compare."""


class RunError(FactlensError, ValueError):
    """A run directory that cannot be gone on with: another configuration, another process, or no run at all."""


class WorkersError(FactlensError, RuntimeError):
    """Workers that cannot be started, or die again and again at the same work."""


class DownloadError(FactlensError, OSError):
    """A file that cannot be fetched, or whose checksum is not the expected one."""


class OutputError(FactlensError, OSError):
    """A place that cannot be written."""


class FactWarning(UserWarning):
    """Something a user should know about a fact; the trace goes on."""
