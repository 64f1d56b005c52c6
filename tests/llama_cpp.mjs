// Runs a GGUF file in llama.cpp: node tests/llama_cpp.mjs FOLDER < question.json > answer.json
//
// FOLDER contains node_modules with node-llama-cpp (npm install -E node-llama-cpp@3.21.1, in any folder).
// question: {model: path, texts: [...], prompts: [[ids], ...], tokens: N}
// answer: {ids: the texts in tokens, back: the texts decoded, continuations: N greedy tokens after each prompt,
//          probabilities: those of the token after each prompt, as pairs [id, p], ends: [id, whether one is put first]}

import {readFileSync} from "node:fs";
import {pathToFileURL} from "node:url";
import {resolve} from "node:path";

const home = resolve(process.argv[2], "node_modules/node-llama-cpp/dist/index.js");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(home));
const question = JSON.parse(readFileSync(0, "utf8"));

const options = {gpu: false, maxThreads: 1, build: "never", logLevel: LlamaLogLevel.error, progressLogs: false};
const llama = await getLlama(options);
const model = await llama.loadModel({modelPath: question.model, gpuLayers: 0});
const ids = question.texts.map((text) => model.tokenize(text, false));
const answer = {
    ids, back: ids.map((tokens) => model.detokenize(tokens)), context: model.trainContextSize,
    ends: [model.tokens.bos, model.tokens.eos, model.tokens.shouldPrependBosToken],
    continuations: [], probabilities: [],
};
const context = await model.createContext({contextSize: model.trainContextSize, flashAttention: false, threads: 1});
const sequence = context.getSequence();
for (const prompt of question.prompts) {
    const plain = {temperature: 1, topK: 0, topP: 1, minP: 0};
    const last = [prompt.at(-1), {generateNext: {probabilities: true, options: plain}}];
    const outputs = await sequence.controlledEvaluate([...prompt.slice(0, -1), last]);
    answer.probabilities.push([...outputs.at(-1).next.probabilities]);
    await sequence.clearHistory();

    const tokens = [];
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        tokens.push(token);
        if (tokens.length === question.tokens)
            break;
    }
    answer.continuations.push(tokens);
    await sequence.clearHistory();
}
process.stdout.write(JSON.stringify(answer), () => process.exit(0));
