# OpenAI's GPT-2 learns to write like Shakespeare:
# $ python train.py config/finetune_shakespeare.py
# $ python sample.py --out_dir=out-shakespeare-gpt2 --start="ROMEO:"
# The batch, the rate and the number of steps are nanoGPT's. Not run with the real weights yet.

out_dir = 'out-shakespeare-gpt2'
dataset = 'shakespeare'         # the embedded text in GPT-2's tokens, prepared by itself
init_from = 'gpt2'              # or gpt2-medium, -large, -xl; training takes at least 3 GB, for gpt2-xl 31 GB
                                # (python model.py --init_from=gpt2-xl --batch_size=1)

# 32 windows x 1,024 tokens a step, one at a time to save memory: about 9 steps an epoch
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20                  # it overfits soon after
learning_rate = 3e-5            # a twentieth of pretraining's: it should learn, not forget
decay_lr = False
dropout = 0.1

eval_interval = 5
eval_iters = 40
log_interval = 1
always_save_checkpoint = False  # only the best counts
