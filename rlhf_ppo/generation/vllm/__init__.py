"""vLLM over HTTP: a server samples, and is given the policy anew before each rollout. vLLM is never imported."""
