"""Every quality metric behind one protocol (base.py), `python -m metrics.evaluate`, and the HTML report."""
