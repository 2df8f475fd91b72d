"""The commands, a module each: `parser()` returns its parser, `run(session)` carries it out."""
