"""What a run is made of: settings, setting up, evaluation, optimizer, log and resuming."""
