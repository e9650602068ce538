"""Preference pairs from the one-step model: candidates, scores, ranking (build.py), and the blind study
(study/)."""
