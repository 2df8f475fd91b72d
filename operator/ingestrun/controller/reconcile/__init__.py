"""One pass for one run: observe, plan, execute."""
