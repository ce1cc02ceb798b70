"""The paper's settings, and the place where every config field is declared and explained.

Pixels are in [0, 1], so epsilon, step sizes and sigma are too: 8/255, never 8. A system's config
is a diff on this one. A value of None stands for the default that the comment gives.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ensadv.attacks import registry


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.system = 'custom'  # name of the system in tables; each file in configs/ sets its own
    config.device = 'auto'  # cpu, gpu, tpu: refused where there is none; auto: JAX's choice
    config.seed = 0  # of all randomness: initialisation, batches, augmentation, attacks
    # The threat model, in training and evaluation. Step sizes and sigmas below are lengths in its
    # norm too. They follow epsilon unless they are set themselves.
    config.norm = 'linf'  # linf or l2
    config.epsilon = 8 / 255  # the ball's radius; of l2 128/255 is usual

    config.data = data = ConfigDict()
    data.name = 'cifar10'  # cifar10, cifar100, svhn_cropped, mnist, tfds:NAME (TFDS), digits, npz
    data.data_dir = placeholder(str)  # holds prepared TFDS data sets; None: TFDS's own default
    data.download = False  # let TFDS download and prepare a missing data set
    data.path = placeholder(str)  # for npz: file with image_train, label_train, image_test, ...
    data.pad = 4  # pixels of reflection padding before the random crop; 0: no crop
    data.validation_examples = 0  # of the training split, held out for eval.select_on=validation
    data.flip = placeholder(bool)  # random horizontal flip; None: yes, unless images show digits
    data.cutout = 0  # side, in pixels, of a square at a random place that is hidden; 0: none
    data.cutmix = 0.0  # Beta's parameter of the area that is pasted of another image; 0: none
    data.extra = ()  # files (.npz) or folders of more images to train on, see docs/data.md
    data.extra_fraction = 0.0  # of each batch, from data.extra; the rest is of the training split
    data.on_device = 'auto'  # yes, no: stream images from the host; auto: yes if they fit

    config.model = model = ConfigDict()
    # A network of your own is FILE.py:Class, or FILE.py:Class(argument=value), see
    # docs/extending.md. depth and width are not for it.
    model.name = 'wide_resnet'  # architecture: wide_resnet, vgg, or FILE.py:Class
    model.source = placeholder(str)  # text of that file: not to be set, config.json keeps it here
    model.depth = 28  # layers: 6n + 4 for wide_resnet; 11, 13, 16 or 19 for vgg
    model.width = 10  # widening factor; the first channels of vgg are 16 times this
    model.activation = 'relu'  # relu or silu
    # symmetric: a pixel on each side, as the authors pad; same: as TensorFlow and so DeepMind do.
    model.padding = 'symmetric'  # of a wide_resnet's convolutions with stride 2
    model.mean = placeholder(tuple)  # of each channel, to standardise; None: the training images'
    model.std = placeholder(tuple)  # likewise; of one number each, all channels have these
    model.dtype = 'auto'  # training compute: float32, bfloat16; auto: float32 on CPU, else bfloat16
    model.conv = 'auto'  # convolutions: grouped, separate, onednn; auto: onednn on CPU only
    model.remat = False  # training keeps fewer activations and computes them again: less memory

    config.batch_norm = batch_norm = ConfigDict()
    batch_norm.momentum = 0.9  # share of the old average kept; an adversarial step makes two passes
    batch_norm.epsilon = 1e-5  # added to the variance
    batch_norm.sync = False  # batch statistics over all devices, not each device's own share

    config.ensemble = ensemble = ConfigDict()
    ensemble.size = 1  # members, k
    # probs, logits: their mean over the members; gating: the mean of the probs, with weights from
    # small networks that are trained and attacked as part of the model.
    ensemble.combine = 'probs'  # how members' outputs become one
    ensemble.training = 'joint'  # joint: one loss, of the ensemble; separate: each member by itself
    ensemble.gate_width = 16  # for gating: channels of a gate's first layer; its second has twice
    ensemble.members_from = placeholder(str)  # in --mode=evaluate: 'W1,W2', runs that are members
    ensemble.members_snapshot = 'last'  # of members_from: last, or best (see eval.select_on)

    config.train = train = ConfigDict()
    train.steps = 500_000  # updates of the weights
    train.batch_size = 128  # examples per step over all devices
    train.adversarial_weight = 1.0  # rho in (L + rho * L_adv) / (1 + rho); 0: clean training
    # paper: as above; trades (Zhang et al., 2019), mart (Wang et al., 2020): weighed by beta
    # instead, so that train.adversarial_weight stays 1, or is 0 for clean training.
    train.objective = 'paper'  # what training descends: paper, trades or mart
    train.beta = 6.0  # of trades and mart: weight of the divergence of adversarial from clean
    # L is the cross-entropy of the ensemble, or the sum of its members' own. auto: of the members
    # where train.diversity is set, as its authors have it, else of the ensemble.
    train.cross_entropy_of = 'auto'  # ensemble, members or auto
    train.label_smoothing = 0.0  # share of a label's mass spread over all classes; not of mart
    # Adversarial weight perturbation (Wu et al., 2020), of any objective, the clean one too.
    train.awp_gamma = 0.0  # norm of a layer's perturbation / norm of its weights; 0: none
    train.awp_start = 0  # first step with perturbed weights
    # Methods that have members differ, see docs/extending.md: adp (Pang et al., 2019), gal
    # (Kariyappa & Qureshi, 2019), trs (Yang et al., 2021), dverge (Yang et al., 2020). The defaults
    # are their authors'.
    train.diversity = 'none'  # none, adp, gal, trs or dverge
    train.adp_alpha = 2.0  # weight of the entropy of the mean prediction
    train.adp_beta = 0.5  # weight of the log determinant of the other classes' predictions
    train.gal_weight = 0.5  # weight of the alignment of input gradients
    train.trs_similarity = 40.0  # weight of the absolute cosine of input gradients
    # Theirs is 2.5, of twice the square of the gradient of a mean over 128 images.
    train.trs_smoothness = 2 * 2.5 / 128**2  # weight of the square of an image's input gradient
    train.trs_radius = 0.03  # linf ball in which steep points are looked for, in pixels of [0, 1]
    train.dverge_epsilon = 0.07  # linf ball of distilled images, in pixels of [0, 1]
    train.dverge_steps = 10  # of dverge_epsilon / dverge_steps each
    train.dverge_layer = 'random'  # whose features are distilled; random: another at each step
    train.dverge_start = 0  # first step with distilled images; before it there are clean ones
    train.learning_rate = 0.1  # the highest: of the first steps, or of those after the warm-up
    # cosine and linear end at 0 at train.steps; one_cycle rises along a cosine over warmup_steps
    # (0: the first 30 % of train.steps) and falls along one. The next two are of steps alone.
    train.schedule = 'steps'  # of the learning rate: steps, cosine, one_cycle or linear
    train.learning_rate_steps = (30_000, 60_000, 90_000)  # each is the first step with a new rate
    train.learning_rate_factor = 0.2  # new rate / old rate
    train.warmup_steps = 0  # steps over which the learning rate rises from 0 to its highest
    train.momentum = 0.9  # of the SGD
    train.nesterov = False  # plain, as the paper words it; Zagoruyko & Komodakis use Nesterov's
    train.weight_decay = 5e-4  # coupled (added to the gradient)
    train.weight_decay_on = 'all'  # all parameters, or kernels: none on biases and batch norm's
    train.ema_decay = 0.0  # of the weights' exponential moving average; 0: none is kept
    train.steps_per_call = 10  # steps per call of the compiled function
    train.log_every = 100  # steps between two writings of metrics
    train.checkpoint_every = 1_000  # steps between two checkpoints
    train.checkpoints_to_keep = 3  # newest checkpoints kept
    train.snapshot_every = 5_000  # steps between two snapshots; the last step always gives one
    # Where the attack has one step, each writing of metrics also has the accuracy under that step
    # and under two steps, and a warning when the first leaves the second behind: the network has
    # learned to resist that step, and nothing else.
    train.overfitting_gap = 0.2  # by which it may, in accuracy
    train.stop_on_overfitting = False  # stop there, and keep the checkpoint before
    train.profile_step = 0  # profile from the first call at or after this step on; 0: never
    train.profile_steps = 20  # steps that the profile covers

    config.attack = attack = ConfigDict()  # the attack inside training
    # fgsm and n_fgsm make one step: for them steps, step_size, start and sigma do not count, but
    # what their own groups attack.fgsm and attack.n_fgsm have, which are as published.
    attack.name = 'ifgsm'  # ifgsm (sign of the gradient), pgd (Adam on it), fgsm or n_fgsm
    attack.steps = 7  # gradient steps
    attack.step_size = config.get_oneway_ref('epsilon') / 4  # of each step; for pgd Adam's rate
    attack.start = 'gaussian'  # gaussian, uniform (in the ball) or none
    attack.sigma = config.get_oneway_ref('epsilon') / 2  # size of the gaussian start
    attack.loss = 'cross_entropy'  # what the attack climbs: cross_entropy or margin
    attack.batch_norm = 'running'  # statistics while attacking: running averages, or the batch's
    for kind in registry.ONE_STEP:
        attack[kind] = ConfigDict(registry.defaults(kind, config.get_oneway_ref('epsilon')))

    config.eval = evaluation = ConfigDict()
    evaluation.attacks = ('clean', 'ifgsm5', 'ifgsm7', 'pgd5', 'pgd20')  # name and number of steps
    # AutoAttack is what to publish; the others above are the paper's, and cheap.
    evaluation.long_attacks = ('ifgsm500', 'pgd500', 'autoattack')  # once training is done
    evaluation.long_attacks_on = 'best_and_last'  # or last, which costs up to half less
    # Each kind of attack has its settings, in eval.ifgsm and eval.pgd: step_size (epsilon/4 and
    # epsilon/2); schedule (of the step size: constant, or linear or cosine down to 0); start, sigma
    # and loss, as in attack; restarts (independent ones, whose worst point counts). An entry of
    # eval.attacks may have settings of its own: 'pgd20_margin(loss=margin)'. Of AutoAttack
    # and its parts the defaults are the reference's, see docs/evaluation.md.
    for kind in registry.KINDS:
        evaluation[kind] = ConfigDict()
        for field, value in registry.defaults(kind, config.get_oneway_ref('epsilon')).items():
            evaluation[kind][field] = placeholder(int) if value is None else value
    evaluation.seed = 0  # of the attacks' starts
    evaluation.blackbox_path = placeholder(str)  # file of --mode=blackbox; adds attack blackbox
    # The others leave a long attack when they are fooled. These, the first ones, are what the
    # current iterate's accuracy is of. If as many as the test set has, nobody leaves.
    evaluation.iterate_examples = 1000  # examples that stay to the end of a long attack
    # The report shows them; attacked by the one of eval.attacks with the most steps.
    evaluation.examples = 8  # test examples, the first, kept with their adversarial images; or 0
    evaluation.select_on = 'test'  # the best snapshot is chosen on: test (the paper) or validation
    evaluation.batch_size = 500  # examples per call over all devices; alters only rounding
    evaluation.num_examples = placeholder(int)  # the first of the test split; None: all
    # A text file, one whole number a line, as np.savetxt(file, places, fmt='%d') writes it.
    evaluation.indices = placeholder(str)  # file of places in the test split; None: the first ones
    evaluation.weights = 'auto'  # trained or averaged; auto: averaged where train.ema_decay is set
    evaluation.dtype = 'float32'  # compute of the evaluated network: float32 or bfloat16
    evaluation.inline = True  # evaluate each snapshot in the training process
    evaluation.follow = False  # in --mode=evaluate: wait for snapshots until the last is evaluated
    evaluation.follow_timeout = 3600.0  # seconds without a sign of life of training, then give up

    config.blackbox = blackbox = ConfigDict()  # the transfer set, of --mode=blackbox and of studies
    blackbox.sources = ('baseline', 'vgg')  # files in configs/ whose runs are attacked
    blackbox.seed = 1000  # of the sources, so that none of them is also a judged run
    blackbox.steps = 20  # gradient steps of the first round; each round doubles them
    blackbox.rounds = 6  # at most, each on the examples that some source still gets right
    blackbox.step_size = config.get_oneway_ref('epsilon') / 2  # Adam's rate
    blackbox.start = 'gaussian'  # as attack.start
    blackbox.sigma = config.get_oneway_ref('epsilon') / 2  # as attack.sigma

    config.planes = planes = ConfigDict()  # --mode=planes: the paper's Figures 3 and 4
    planes.other = placeholder(str)  # workdir of the second run; None: the run's own two members
    planes.images = ()  # places in the test split; (): the first three without saturated pixels
    planes.attack = 'pgd20'  # whose examples span the planes: ifgsm or pgd, and number of steps
    planes.window = 3.0  # width and height of what is drawn, in units of epsilon
    planes.resolution = 200  # pixels along each side of a window

    config.audit = audit = ConfigDict()  # --mode=audit: can the numbers be believed?
    audit.examples = 200  # test examples, the first, that it looks at

    config.members = members = ConfigDict()  # --mode=members: what do an ensemble's members do?
    members.examples = 200  # test examples, the first, that it looks at
    # As eval.attacks has them, but of one stage: apgd_ce, and not autoattack.
    members.attacks = ('pgd20', 'apgd_ce')  # whose examples are shown to the others
    members.directions = 3  # random ones from each image, along which boundaries are looked for
    members.radius = 8.0  # up to which they are, in epsilons

    config.debug = debug = ConfigDict()
    debug.nans = False  # when training stops on NaN or infinity, find the step, member and layer

    config.study = study = ConfigDict()  # --mode=study: many runs, one table
    study.systems = ()  # names of files in configs/; every other field here is their common base
    study.seeds = (0,)  # each system is run once with each seed
    study.audit = True  # audit each run's last snapshot at the end
    study.members = True  # and measure what the members of each ensemble do
    # Each beside the system of study.systems that is trained cleanly, with as many members.
    study.responses = ()  # adversarially trained systems whose decision boundaries are drawn
    study.planes = ()  # two of the systems: decision planes of their first seed's runs; or none
    return config.lock()
