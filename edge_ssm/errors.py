"""Every error that edge-ssm raises on purpose.

    EdgeSSMError            anything below; ``str(error)`` is one line fit for a user
      UsageError            wrong use: an option, an argument, a file that is not there
      InputRefused          something handed in is not acceptable
        ArtifactError         a model file: damaged, hostile, or of another version
        NetworkError          a network whose parts do not fit together
        FrameError            a stream whose shape is wrong from its start
        SampleError           one sample that an engine must not see (non-finite, out of range)
        SnapshotError         a state that does not belong to this network
        SignatureRefused      a model without the signature of a trusted key
      RunFailed             the work began and could not be ended
        EngineUnavailable     an engine's package or hardware is missing

``exit_status`` is what the command line returns: 2 for wrong use and refused input, 1 for a failed run.
"""

from __future__ import annotations


class EdgeSSMError(Exception):
    """Base of all errors of this package. Its text says what, where, what was expected, what to do."""

    exit_status = 1


class UsageError(EdgeSSMError):
    exit_status = 2


class InputRefused(EdgeSSMError):
    exit_status = 2


class ArtifactError(InputRefused):
    pass


class NetworkError(InputRefused):
    pass


class FrameError(InputRefused):
    pass


class SampleError(InputRefused):
    pass


class SnapshotError(InputRefused):
    pass


class SignatureRefused(InputRefused):
    pass


class RunFailed(EdgeSSMError):
    pass


class EngineUnavailable(RunFailed):
    pass


class SinkClosed(Exception):
    """The reader of the output has gone away."""


class MeterUnavailable(EdgeSSMError):
    """No such sensor here, or it can't be read; the text says why."""


class MeterLost(EdgeSSMError):
    """It read and does not any more."""
