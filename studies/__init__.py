"""The papers' studies, run as `python -m studies.NAME` from the folder above."""
