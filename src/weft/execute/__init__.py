"""Plan -> blocks: evaluates expressions and hands the result to a sink."""
