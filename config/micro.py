"""41.6M parameters with GPT-2's vocabulary, and 25.8M of the output head: for one GPU, or for a look at it on a CPU."""
dataset = "fineweb,fables"
out_dir = "out/micro"
parallel = "ddp"
n_layer = 8
n_head = 8
n_embd = 512
token_dim = 136
cross_every = 1
block_size = 512
prompt_size = 64
batch_tokens = 64 * 512          # 64 sequences, at once if they fit
max_steps = 60_000               # 2B tokens
learning_rate = 1e-3
warmup_steps = 1000
ema_decay = 0.9995
eval_interval = 2000
save_interval = 1000
