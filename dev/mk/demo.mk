.PHONY: demo

demo: deps ## Real data through the operator in a real cluster, then a cancel half-way, each claim checked: CLUSTER=kind|current
	@python3 -m dev.demo
