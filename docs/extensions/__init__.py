"""What the site has that Sphinx has not: formulas without scripts, the notebooks, tables out of recorded results."""
