"""Which files of the bench pytest leaves unread: workers that import packages the project does not need."""

collect_ignore = ["numpyro_peer.py", "pythae_peer.py"]
