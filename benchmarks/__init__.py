"""`lwft-bench`: the ops and a real fine-tune against what people use today, correctness checked first."""
