"""Survivor bits become a plan of work for the backward."""
