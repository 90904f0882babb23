"""How programs of tests are compiled: most of them are small and run once."""

# Not optimised, and not cut into parts that are compiled beside one another, which takes a sixth more.
QUICKLY = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
