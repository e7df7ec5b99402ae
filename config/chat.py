"""Answers to easy questions, by adapters beside pretrained/simple: minutes on a CPU. Its data is made by
python prepare_fineweb.py --source=pretrained/chat.jsonl --tokenizer=pretrained/simple --out=data/chat"""
dataset = "chat"
out_dir = "out/chat"
init_from = "pretrained/simple"
lora_rank = 16
lora_alpha = 32.0
block_size = 64
batch_size = 32
batch_tokens = 32 * 64
max_steps = 400                  # each of 600 examples is read about 20 times
learning_rate = 3e-3
warmup_steps = 20
ema_decay = 0.99
p_window = 0.0                   # no whole windows, for the length of an answer is not known,
p_strided = 0.0                  # nor blocks spread over it,
p_given = 0.0                    # and nothing of it is given
log_interval = 20
eval_interval = 200
save_interval = 200
