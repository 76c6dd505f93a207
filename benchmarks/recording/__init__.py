"""What all commands that train share: how they record a run, and options of theirs."""
