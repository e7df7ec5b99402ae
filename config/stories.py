"""The stories of bench/LOG.md at the size of a laptop: 4 layers of width 256, a vocabulary of 4,096, 12M tokens."""
dataset = "data/stories"
out_dir = "out/stories"
n_layer = 4
n_head = 4
n_embd = 256
token_dim = 128
cross_every = 2
block_size = 64
prompt_size = 32
batch_size = 32
batch_tokens = 32 * 64
max_steps = 6000
learning_rate = 3e-3
warmup_steps = 200
eval_interval = 1000
save_interval = 500
