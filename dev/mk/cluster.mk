# The development cluster. Options are environment or make variables; dev/cluster/README.md lists them.
export CLUSTER NODES SIMULATED_NODES LIMITS API_PORT ENGINE NODE_IMAGE

DEVCLUSTER := python3 dev/cluster

.PHONY: deps cluster-up cluster-down cluster-status cluster-load

deps: ## Install what the development cluster needs on this machine (Debian and Ubuntu, as root)
	@python3 -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "python3 with venv is missing, which dev/cluster and the tests are written in: installing it"; \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends python3 python3-venv; } \
	  || { echo "install python3 (3.11 or newer) with its venv module, then call make again" >&2; exit 1; }; }
	@$(DEVCLUSTER) deps

cluster-up: ## Create the kind cluster, or adapt it: NODES=real|simulated|both LIMITS=raised|default CLUSTER=kind|current
	@$(DEVCLUSTER) up

cluster-down: ## Remove the kind cluster and all that belongs to it
	@$(DEVCLUSTER) down

cluster-status: ## Show the cluster, its nodes and what is not well
	@$(DEVCLUSTER) status

cluster-load: ## Load images into the cluster: IMAGES="a b"
	@$(DEVCLUSTER) load $(IMAGES)
