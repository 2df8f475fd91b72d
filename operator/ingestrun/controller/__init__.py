"""The controller: watches, observes, plans, executes, and remembers."""
