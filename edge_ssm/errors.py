"""Every error that edge-ssm raises on purpose.

    EdgeSSMError            base class; ``str(error)`` is one line fit for a user
      UsageError            wrong use: an option, an argument, a configuration, a missing package      exit status 2
      InputRefused          an input that is not acceptable                                            exit status 2
        ArtifactError         a model file that is damaged, hostile or of another version
        NetworkError          a network whose parts do not fit together
        FrameError            a stream whose shape is wrong from its start
        SampleError           a sample that no engine may see (not finite, out of range)
        SnapshotError         a state that does not belong to this network
        SignatureRefused      a model without the signature of a trusted key
      RunFailed             work that began and could not be completed                                 exit status 1
        EngineUnavailable     an engine whose package or hardware is missing
      MeterUnavailable      a power sensor that is missing or cannot be read                           exit status 1
      MeterLost             a power sensor that stopped working                                        exit status 1
    SinkClosed              internal: the reader of the output is gone, which ends a run normally

The command line returns ``exit_status`` of the error that ended it. A message names what is wrong and where, what was
expected, and what to do about it.
"""

from __future__ import annotations


class EdgeSSMError(Exception):
    """Base class of all errors that users of this package see."""

    exit_status = 1
    """Exit status of the command line when this error ends it."""

    def __init__(self, *arguments: object, setting: str = "") -> None:
        super().__init__(*arguments)
        self.setting = setting
        """Name of the setting (``service.settings``) that the error is about, if it is about one."""


class UsageError(EdgeSSMError):
    """Wrong use: an option, an argument, a configuration file, or a package that has to be installed."""

    exit_status = 2


class InputRefused(EdgeSSMError):
    """An input (model, stream, report, key, snapshot) that is not acceptable."""

    exit_status = 2


class ArtifactError(InputRefused):
    """A model file that is damaged, hostile or of another version."""


class NetworkError(InputRefused):
    """A network whose parts do not fit together."""


class FrameError(InputRefused):
    """A stream whose shape is wrong from its start, so that no later frame can be right."""


class SampleError(InputRefused):
    """A sample that no engine may see: not finite, or out of the range that the model accepts."""


class SnapshotError(InputRefused):
    """A saved state that is damaged or does not belong to this network."""


class SignatureRefused(InputRefused):
    """A model without the signature of a trusted key."""


class RunFailed(EdgeSSMError):
    """Work that began and could not be completed."""


class EngineUnavailable(RunFailed):
    """An engine whose package or hardware is missing."""


class MeterUnavailable(EdgeSSMError):
    """A power sensor that is missing or cannot be read; the text says why."""


class MeterLost(EdgeSSMError):
    """A power sensor that was read before and cannot be read any more."""


class SinkClosed(Exception):
    """The reader of the output is gone: the run ends, which is not an error (internal)."""
