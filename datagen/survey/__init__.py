"""Videos to windows: decoded once and small, cut at scene changes, measured."""
