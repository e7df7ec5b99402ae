"""Dialogues and very short stories in simple English: 7.1M parameters, 61M tokens, for a GPU or two cores' nights."""
dataset = "simple"               # such as the Self-dialogue Corpus and TinyStories, --tokenizer=corpus
out_dir = "out/simple"
n_layer = 6
n_head = 4
n_embd = 256
token_dim = 128
cross_every = 3
block_size = 128
prompt_size = 32
batch_size = 32
batch_tokens = 32 * 128
align = 0.5                      # half of the windows begin with a document
p_single = 0.35
p_window = 0.15
p_given = 0.15
p_strided = 0.0
max_steps = 15_000
learning_rate = 2e-3
warmup_steps = 300
eval_interval = 1250
eval_sequences = 128
save_interval = 250
keep_interval = 1250
