"""Which bugs change nothing that can be observed, and what the lessons see of the others.

`EQUIVALENT[module]`: {bug of the general kind, as `mutation.py list` writes it: why it changes nothing}. Such bugs are
not planted. A key holds the function and the two snippets, and no line number."""

NO_GPU = 'seen only where there is a GPU'
DEFAULT_DIM = 'for two dimensions, torch takes the last one'
SQUARED = 'the sign is lost in the square'
SYMMETRIC = 'the two sides of a correlation may be exchanged'
EITHER_WAY = 'the loss is the same both ways'
TIMES_ZERO = 'what stands there is multiplied by 0'
ROUNDING = 'a bound on rounding errors, which no row is near'

EQUIVALENT = {
    'logit_losses': {
        'column_weights: torch.as_tensor(class_weights, dtype=logits.dtype, device=logits.device) → '
            'torch.as_tensor(class_weights, dtype=logits.dtype)': NO_GPU,
        '_row_weights: torch.as_tensor(image_weights, dtype=logits.dtype, device=logits.device) → '
            'torch.as_tensor(image_weights, dtype=logits.dtype)': NO_GPU,
        'mask_tensors: 0 → 1': 'all tensors have the shape of the mask: any of them will do to check it',
        '_soften: F.log_softmax(z / temperature, dim=1) → F.log_softmax(z / temperature)': DEFAULT_DIM,
        '_divergence: 0 → 1': TIMES_ZERO,
        '_divergence: 0 → 1 (2)': TIMES_ZERO,
        'logit_mse_loss: s, t = mask_tensors(mask, *cut_off_teacher(student_logits, teacher_logits)) → '
            't, s = mask_tensors(mask, *cut_off_teacher(student_logits, teacher_logits))': SQUARED,
        'logit_mse_loss: s, t = (z - z.mean(1, keepdim=True) for z in (s, t)) → '
            't, s = (z - z.mean(1, keepdim=True) for z in (s, t))': SQUARED,
        'logit_mse_loss: z - z.mean(1, keepdim=True) → z.mean(1, keepdim=True) - z': SQUARED,
        'logit_mse_loss: s - t → t - s': SQUARED,
        '_one_against_others: F.log_softmax(others, dim=1) → F.log_softmax(others)': DEFAULT_DIM,
        'normalized_loss: 0 → 1': TIMES_ZERO,
        '_z_scores: rows.detach().abs().amax(1, keepdim=True).clamp_min(info.tiny) → '
            'rows.detach().abs().amax(1, keepdim=True)': 'a row of zeros: 0/0 is NaN, which is above no bound either',
        '_z_scores: rows.detach().abs().amax(1, keepdim=True) → rows.detach().abs().mean(1, keepdim=True)': ROUNDING,
        '_z_scores: rows.detach() → rows': 'a comparison has no gradient',
        '_z_scores: variance > (8 * info.eps) ** 2 → variance >= (8 * info.eps) ** 2': ROUNDING,
        '_z_scores: 8 * info.eps → info.eps': ROUNDING,
        '_z_scores: 8 → 9': ROUNDING,
        '_z_scores: 1 → 2': TIMES_ZERO,
        'dist_loss: q, p = (z.exp() for z in _soften(student_logits, teacher_logits, temperature)) → '
            'p, q = (z.exp() for z in _soften(student_logits, teacher_logits, temperature))': SYMMETRIC,
        'dist_loss: _decorrelation(q, p, torch.ones_like(q[0])) → '
            '_decorrelation(p, q, torch.ones_like(q[0]))': SYMMETRIC,
        'dist_loss: _decorrelation(q.T, p.T, counts) → _decorrelation(p.T, q.T, counts)': SYMMETRIC,
        'bernoulli_hard_token_loss: theirs > 0 → theirs >= 0': 'a logit of 0 is neither present nor absent',
    },
    'feature_losses': {
        'hint_loss: s, t = cut_off_teacher(student_features, teacher_features) → '
            't, s = cut_off_teacher(student_features, teacher_features)': SQUARED,
        'hint_loss: s - t → t - s': SQUARED,
        'hint_loss: if image_weights is None → (never)': 'with weights of 1, the general way gives the same mean',
        'attention_map: promote_precision(features)[0].square().mean(1) → '
            'promote_precision(features)[0].square().sum(1)': 'the length is divided out',
        'attention_transfer_loss: attention_map(student_features) - attention_map(teacher_features.detach()) → '
            'attention_map(teacher_features.detach()) - attention_map(student_features)': SQUARED,
        'relational_distance_loss: s, t = _embeddings(student_features, teacher_features) → '
            't, s = _embeddings(student_features, teacher_features)': EITHER_WAY,
        'relational_angle_loss: s, t = _embeddings(student_features, teacher_features) → '
            't, s = _embeddings(student_features, teacher_features)': EITHER_WAY,
        'relational_angle_loss: torch.eye(b, dtype=torch.bool, device=s.device) → '
            'torch.eye(b, dtype=torch.bool)': NO_GPU,
        '_cosines: x - x.mean(0) → x.mean(0) - x': 'angles stay when all rows are turned around',
        '_cosines: x.mean(0) → x.amax(0)': 'angles do not see a shift',
        'cosine_loss: s, t = (_unit(tokens) for tokens in cut_off_teacher(student_tokens, teacher_tokens)) → '
            't, s = (_unit(tokens) for tokens in cut_off_teacher(student_tokens, teacher_tokens))': EITHER_WAY,
    },
    'losses': {
        'focal_loss: F.log_softmax(*promote_precision(logits), dim=1) → F.log_softmax(*promote_precision(logits))':
            DEFAULT_DIM,
    },
}

# The least share of the bugs of the general kind that lessons must see, module by module. All bugs that are named one
# by one must be seen. Raise a share when lessons have become better.
LEAST = {'logit_losses': .96, 'feature_losses': .95, 'losses': .95, 'teacher': .6, 'callbacks': .5, 'fit': .45,
         'features': .45, 'cache': .5, 'methods': .55, 'exits': .6, 'multidim': .75, 'multistage': .65, 'adapt': .6,
         'create': .65, 'classifier': .8, 'embeddings': .65, 'labelwise': .6, 'subclasses': .7, 'labelfree': .7}

# Of the engine, whose lessons train, a share of the bugs of the general kind: the same ones each time
SHARE = {'teacher': .1, 'callbacks': .1, 'fit': .1, 'features': .25, 'cache': .04, 'methods': .12, 'exits': .06,
         'multidim': .08, 'multistage': .15, 'adapt': .06, 'create': .02, 'classifier': .2, 'embeddings': .2,
         'labelwise': .2, 'subclasses': .2, 'labelfree': .2}
PARTS = {'logit_losses': 3} # as many processes for a module with many bugs
