# Finetune OpenAI's GPT-2 on a few thousand questions and answers.
# $ python prepare.py --dataset=qa --source=qa.jsonl --tokenizer=gpt2
# $ python train.py config/finetune_qa.py
# $ python sample.py --out_dir=out-qa --interactive=True
#
# A small model from scratch takes 70 s on two cores (needs pytest):
# $ python -c "import json, test_model as t; print(*map(json.dumps, t.question_pairs()), sep='\n')" \
#       > demo.jsonl
# $ python prepare.py --dataset=demo --source=demo.jsonl --tokenizer=char
# $ python train.py config/train_shakespeare.py --dataset=demo --out_dir=out-demo \
#       --n_head=4 --max_iters=1000
# Of the last 500 questions, which it has not seen, seeds 1337 to 1339 answer 86, 20 and 90%: words to
# spell backwards, capitals, and sums, which are learned suddenly or not yet. After 1,400 steps: 97, 37
# and 96%. Measured on 2026-11-29 with OMP_NUM_THREADS=1 and sample.py --interactive=True
# --temperature=0, with /reset between the questions.

out_dir = 'out-qa'
dataset = 'qa'
init_from = 'gpt2'       # or 'gpt2-medium', 'gpt2-large', 'gpt2-xl'

# 8 sequences x 1,024 tokens a step, one at a time to save memory. 3,000 pairs of 50 tokens are
# 18 steps an epoch, so 60 steps are about three epochs. train.py prints how many yours are.
batch_size = 1
gradient_accumulation_steps = 8
max_iters = 60
learning_rate = 5e-5     # a twelfth of the rate for pretraining, to keep what GPT-2 has learned
min_lr = 5e-6
warmup_iters = 6
dropout = 0.1

eval_interval = 10
eval_iters = 40
log_interval = 1
always_save_checkpoint = False  # save only when the val loss improves
