# Cancellation on the real API server: the races, and what a cancel costs. docs/proof.md has results.
export RUNS SEED WAVE MODE LEASE_EVERY ROUNDS BATCHES TAIL PARALLELISM BENCH_RUNS BENCH_PODS

.PHONY: test-cancel-races test-race bench-cancel bench-cancel-many bench-scale bench-long-run bench-throughput bench-pool bench-idle bench-cli calls

test-cancel-races: $(VENV)/.installed ## Cancels at random moments, the operator killed meanwhile, judged by the audit log: RUNS=2000 SEED=1 MODE=both|pool|jobs
	@eval "$$($(DEVCLUSTER) env)" && $(BIN)/pytest -q tests/race/test_cancel_races.py

test-race: $(VENV)/.installed ## The same with few runs, 500 cancels at once, a cancel by selector, the budget of calls
	@eval "$$($(DEVCLUSTER) env)" && $(BIN)/pytest -q tests/race

bench-cancel: $(VENV)/.installed ## From patch to Cancelled, 20 runs of 10 running pods, and the calls per cancelled run: ROUNDS=6
	@eval "$$($(DEVCLUSTER) env)" && $(BIN)/pytest -q dev/bench/cancel.py

bench-cancel-many: $(VENV)/.installed ## From patch to Cancelled for 500 runs at once
	@eval "$$($(DEVCLUSTER) env)" && $(BIN)/pytest -q dev/bench/cancel_many.py

calls: $(VENV)/.installed ## The operator's API calls by verb and resource, per batch: BATCHES=20
	@eval "$$($(DEVCLUSTER) env)" && $(BIN)/pytest -q dev/bench/calls.py

bench-scale: $(VENV)/.installed ## One long run on the cluster, its cost by tenths: BATCHES=1500 PARALLELISM=40; or its two ends: BATCHES=100000 TAIL=1000
	@eval "$$($(DEVCLUSTER) env)" && $(BIN)/pytest -q dev/bench/scale.py

bench-long-run: $(VENV)/.installed ## The same before a cluster in memory: BATCHES=100000
	@$(BIN)/pytest -q dev/bench/long_run.py

bench-throughput: $(VENV)/.installed ## Batches/s, CPU and calls per batch, 20 runs of 10 short batches at once: BENCH_RUNS=20 BATCHES=10
	@eval "$$($(DEVCLUSTER) env)" && $(BIN)/pytest -q dev/bench/throughput.py

bench-pool: $(VENV)/.installed ## Batches/s, CPU, writes and latency of claims, 20 pools of 5 simulated workers, then one of 100: BATCHES=4000
	@eval "$$($(DEVCLUSTER) env)" && $(BIN)/pytest -q dev/bench/pool.py

bench-idle: $(VENV)/.installed ## Memory with 5,000 suspended runs, and the CPU time of a restart: RUNS=5000
	@eval "$$($(DEVCLUSTER) env)" && $(BIN)/pytest -q dev/bench/idle.py

bench-cli: $(VENV)/.installed ## From the start of kubectl ingestrun to its answer, at most 0.4 s: ROUNDS=20
	@eval "$$($(DEVCLUSTER) env)" && $(BIN)/python -m dev.bench.cli_start
