"""How a trainer's process says why it ended; any other code is a death."""

FINISHED = 0
REFUSED = 65  # `failure.json` says why; trying again would end the same
PAUSED = 75  # checkpointed on request
FAILURE = "failure.json"
"""In the job's folder: code and message of who refused."""
