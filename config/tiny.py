"""Minutes on a laptop: half a million parameters beside token vectors and head, on text that Python brings along."""
dataset = "fineweb,pydoc"
out_dir = "out/tiny"
n_layer = 2
n_head = 2
n_embd = 128
token_dim = 64
cross_every = 2
block_size = 64
prompt_size = 32
batch_size = 32
batch_tokens = 32 * 64
max_steps = 600                  # 1.2M tokens, 4 epochs; more makes the bound worse
learning_rate = 3e-3
warmup_steps = 50
ema_decay = 0.995
eval_interval = 300
save_interval = 300
