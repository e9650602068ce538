"""The ground that every package stands on: errors, configuration, files, seeds, progress, storage, video."""
