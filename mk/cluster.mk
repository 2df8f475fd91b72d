# The development cluster. Options are environment or make variables; devcluster/README.md tells them all.
export CLUSTER NODES SIMULATED_NODES LIMITS API_PORT ENGINE NODE_IMAGE

DEVCLUSTER := python3 devcluster

.PHONY: deps cluster-up cluster-down cluster-status cluster-load

deps: ## Install what the development cluster needs on this machine (Debian and Ubuntu, as root)
	@$(DEVCLUSTER) deps

cluster-up: ## Create the kind cluster, or adapt it: NODES=real|simulated|both LIMITS=raised|default CLUSTER=kind|current
	@$(DEVCLUSTER) up

cluster-down: ## Remove the kind cluster and all that belongs to it
	@$(DEVCLUSTER) down

cluster-status: ## Show the cluster, its nodes and what is not well
	@$(DEVCLUSTER) status

cluster-load: ## Load images into the cluster: IMAGES="a b"
	@$(DEVCLUSTER) load $(IMAGES)
