"""How launch/train.py ends, for launchers, batch systems and `largebatch run`."""

DONE = 0
"""To the end, or to a checkpoint after Ctrl-C or SIGTERM."""

NOT_SAVED = 1
"""The last checkpoint could not be written. Also Python's own for an error that nobody expected."""

BAD_REQUEST = 2
"""Something is wrong with the request and will be the next time; one line says what."""

LOST_RANK = 3
"""Another rank, or the network to it, is gone; or an earlier run is still at work in the folder. May pass by itself."""
