# The images and the lock files. BASE=IMAGE replaces the base; IMAGE_PREFIX=registry.example.com/team/ names a registry.
export BASE IMAGE_PREFIX KREW_URL

IMAGES := python3 -m dev.images

.PHONY: images images-load images-push lock lock-upgrade krew

images: ## Build the images that have changed, print their sizes, load them if the cluster is up: BASE= IMAGE_PREFIX=
	@$(IMAGES) build
	@if [ "$(CLUSTER)" != current ]; then if $(DEVCLUSTER) status >/dev/null 2>&1; then $(IMAGES) load; fi; \
	elif [ "$(filter-out localhost/%,$(IMAGE_PREFIX))" ]; then $(IMAGES) push; fi

images-load: ## Load the images into the kind cluster
	@$(IMAGES) load

images-push: ## Push the images to the registry that IMAGE_PREFIX named when they were built
	@$(IMAGES) push

krew: ## Make what krew installs kubectl ingestrun by, in build/krew: KREW_URL=https://where.the/archive/will/be
	@$(IMAGES) krew

lock: ## Make requirements/*.lock anew after a change of pyproject.toml or requirements/*.in
	@$(IMAGES) lock

lock-upgrade: ## The same, taking the newest versions
	@$(IMAGES) lock --upgrade
