"""Every quality metric behind one protocol (frame_metric.py), `metrics.evaluate`, `metrics.compare`, and reports."""
