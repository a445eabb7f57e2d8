"""Exceptions. Each is also the builtin that a caller would already catch.

Every message says the path or field, what was expected, what was found, and what to do about it. All of them
can be built from one string, which is how torch raises a worker's exception again in the parent process.
"""


class SaevTorchError(Exception):
    """Base of every exception that this package raises on purpose."""


class ConfigError(SaevTorchError, ValueError):
    """A field of a config has a bad value, or one that this shard directory cannot serve."""


class LabelsNotFoundError(ConfigError, FileNotFoundError):
    """A config asks for labels, and the shard directory has none; `saev` says the same with a `FileNotFoundError`."""


class FormatError(SaevTorchError, ValueError):
    """A shard directory exists, but its content does not follow the format."""


class EmptyShardError(FormatError, FileNotFoundError):
    """A shard file that should hold examples is empty; `saev` says the same with a `FileNotFoundError`."""


class ShardsNotFoundError(SaevTorchError, FileNotFoundError, RuntimeError):
    """A shard directory, or a file that it must hold, is not there; for a directory `saev` raises a `RuntimeError`."""


class UntrustedError(SaevTorchError, RuntimeError):
    """What was asked for would run code that a stranger may have put into a shard directory."""


class ReadError(SaevTorchError, OSError):
    """Reading a shard failed while batches were being made."""


class StalledReadError(SaevTorchError, TimeoutError):
    """No batch came and no read finished within `batch_timeout_s`: one does not return."""


class WorkerLostError(SaevTorchError, RuntimeError):
    """A worker process ended before its batch was taken over; torch says the same with a `RuntimeError`."""


class EndedError(SaevTorchError, RuntimeError):
    """An iteration was ended by another thread, or by another iteration, before its consumer had all batches."""


class StateError(SaevTorchError, ValueError):
    """A state was saved from other data or another config, or is not a state at all."""


class WriteError(SaevTorchError, OSError):
    """Activations could not be written, or do not fit the metadata that was announced."""
